"""The data sets, one file each, and mixtures.py: what midtraining and SFT are made of."""
