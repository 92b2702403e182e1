"""What people look at: scores, votes, comparisons, lineage, pages."""
