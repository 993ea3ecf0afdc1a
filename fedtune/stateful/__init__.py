"""Methods whose clients keep something of their own from round to round: one paper each, numpy alone, the
same for every engine and device.
"""
