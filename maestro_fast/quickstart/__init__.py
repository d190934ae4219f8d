"""The newcomer's run: a tiny model, warm-started on bundled text, then trained with the anchored Conductor or none."""
