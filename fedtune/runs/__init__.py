"""A run on the disk: its folder, checkpoints, and the ledger of what left."""
