"""The torch modules that adapter methods put into a model, and their twins."""
