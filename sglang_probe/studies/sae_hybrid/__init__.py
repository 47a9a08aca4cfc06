"""Training on a mixture of human text and the model's own: which share of decode rows is best for which rows?"""
