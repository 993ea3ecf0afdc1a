"""What a run says about itself: a page, a terminal summary, and comparisons of runs,
all from its summary.json.
"""
