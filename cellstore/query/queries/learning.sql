-- The metrics of a training, epoch by epoch.
-- :run (train run) = latest  Which training.
SELECT epoch, name, value
FROM run_metrics
WHERE run_id = $run
ORDER BY epoch, name
