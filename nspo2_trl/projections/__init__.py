"""What is done to all blocks of a model around an optimizer step: one module per kind of projection.

May import `engine`, `layout` and the tables of options and metrics. A projection is handed what a step needs and calls
nothing above itself.
"""
