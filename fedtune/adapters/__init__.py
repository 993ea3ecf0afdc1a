"""What is trained beside the frozen base.

`spec` is numpy only; the methods need torch and are imported by name.
"""
