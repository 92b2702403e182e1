"""Treatments: plate maps, the tables of what was done, names that are one."""
