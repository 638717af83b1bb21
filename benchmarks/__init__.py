"""The programs that measured what docs/ reports; they are not installed. Each prints its table, and
those that take hours continue where they stopped."""
