"""The programs that measured what docs/ reports; not installed. Each prints a table, and those that
take hours continue where they stopped."""
