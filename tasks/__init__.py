"""The data sets, one file each, and mixtures.py, which combines them."""
