"""What is trained beside the frozen base.

`layers` and `methods` need torch; the rest is numpy only. How to add a method: `kinds.table`.
"""
