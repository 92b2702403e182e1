-- Exclusions that came after the cells were found: one row per row of exclusions by an annotation, or
-- by a flag of the quality-control run that --exclude-flagged names. An excluded cell of the
-- segmentation has no vote either: see predictions_with_image.
SELECT level, id, reason, source, run_id, annotation_id
FROM exclusions
WHERE source = 'annotation'
