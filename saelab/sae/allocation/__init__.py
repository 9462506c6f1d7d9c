"""Which (token, feature) entries stay active: rules.py states each paper's rule; the other files apply it fast."""
