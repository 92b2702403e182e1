"""Saved questions that come with cellstore; see :mod:`cellstore.analytics.saved`."""
