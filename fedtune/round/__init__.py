"""A round: the coordinator's side, a client's side, and the loop between them. No transport, no torch."""
