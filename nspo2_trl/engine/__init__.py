"""The mathematics of NSPO2, with torch alone: covariance, eigensolvers, strategies, projection, sentinel, figures.

Of the package only `config` and this room may be imported here. Nothing here knows a model, a trainer or a file;
tensors come in as (B, m, d), B blocks of one shape.
"""
