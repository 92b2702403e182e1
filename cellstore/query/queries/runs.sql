-- Every run, the newest first: what it did, how it ended, how long it took, who started it.
-- :stage (text) = nothing  Only this stage, like train or predict.
SELECT
    id AS run, stage, status, parent_id AS from_run, started_at,
    epoch(ended_at - started_at) AS seconds, user_name, command
FROM runs
WHERE $stage IS NULL OR stage = $stage
ORDER BY id DESC
