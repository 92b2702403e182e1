"""Objects and features that other tools found and measured."""
