"""Keep what the model knew: an adapter projected off the directions that retained texts use. See docs/retain.md."""
