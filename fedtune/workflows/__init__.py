"""Whole tasks, composed from roles and libraries: what each command calls."""
