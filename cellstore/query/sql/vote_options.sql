-- The options of a vote: one row. min_cells: an image or well with fewer cells abstains;
-- min_margin: so does one whose winner's share is not so much above the runner-up's; controls:
-- whether wells with controls count. Changed by the options of votes, report and compare.
SELECT 1 AS min_cells, CAST(0 AS DOUBLE) AS min_margin, true AS controls
