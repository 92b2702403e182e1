-- What every voter said where flagged cells have no vote: in place of ballots, by
-- report --exclude-flagged. {run} is the number of a quality-control run.
SELECT p.run_id, p.image_id, p.cell_id, p.rank, p.label_id, p.probability
FROM placed_predictions AS p
WHERE
    NOT p.excluded
    AND NOT EXISTS (FROM image_flags AS f WHERE f.run_id = {run} AND f.image_id = p.image_id)
    AND NOT EXISTS (FROM cell_flags AS f WHERE f.run_id = {run} AND f.cell_id = p.cell_id)
