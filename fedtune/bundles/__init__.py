"""What is made once from a job and a base, and travels to devices."""
