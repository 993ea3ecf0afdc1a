"""What every part uses and no part owns: trees of arrays, seeds, files, metrics."""
