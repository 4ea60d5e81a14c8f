"""The commands, one module each; `main` is the entry point. The only package that prints."""
