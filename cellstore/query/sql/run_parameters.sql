-- Every parameter of the recipe of every run: one row per run and parameter. value is its text, of a
-- list the JSON; null: none was given.
SELECT r.id AS run_id, r.stage, j.name, p.parameters ->> ('$."' || j.name || '"') AS value
FROM runs AS r
JOIN recipes AS p ON p.id = r.recipe_id
CROSS JOIN (SELECT unnest(json_keys(p.parameters)) AS name) AS j
