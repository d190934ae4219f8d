"""Adaptive weights inside other people's trainers. Each module here needs the library it is named for."""
