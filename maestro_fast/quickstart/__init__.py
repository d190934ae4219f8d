"""The quickstart: a tiny model, warm-started on bundled text, is trained with adaptive and with equal weights."""
