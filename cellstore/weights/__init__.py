"""Networks that ship with cellstore, with their model card."""
