-- Every run, the newest first: what it did, how it ended, how long it took, who started it.
-- Its command, recipe and files: cellstore audit run NUMBER.
-- :stage (text) = nothing  Only this stage, like train or predict.
SELECT
    id AS run, stage, status, parent_id AS from_run,
    strftime(started_at, '%Y-%m-%d %H:%M') AS started,
    epoch(ended_at - started_at) AS seconds, user_name AS user
FROM runs
WHERE $stage IS NULL OR stage = $stage
ORDER BY id DESC
