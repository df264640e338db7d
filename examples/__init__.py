"""Programs that use the library from outside."""
