"""Floor 5: one training run. Its settings, its state on disk, its processes, its data order and
caches, EMA, and what it shows while it goes on. Knows no student by name; the loop itself is
train.py."""
