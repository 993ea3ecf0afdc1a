"""What benchmarks/simulation.py lets race: one module for each contender,
and the work that all of them do.
"""
