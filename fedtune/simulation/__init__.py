"""Many clients on one machine. Each engine runs a ServerApp against a ClientApp."""
