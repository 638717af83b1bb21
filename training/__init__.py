"""Floor 5: one training run: its settings, state on disk, processes, data order, caches, EMA, and
what it shows. Knows no student by name; the loop itself is train.py."""
