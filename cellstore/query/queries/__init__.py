"""Saved queries that come with cellstore; see :mod:`cellstore.query.saved_queries`."""
