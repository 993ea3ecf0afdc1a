"""What each adapter method trains, by names and shapes: no torch."""
