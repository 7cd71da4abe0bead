"""The data sets: one file each, and mixtures.py, the table of what midtraining and SFT are made of."""
