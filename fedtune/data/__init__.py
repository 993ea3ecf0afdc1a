"""What clients hold: reading it, dealing it out in a simulation, and turning it into arrays."""
