-- The metrics by cell, each split's value with its interval; a gap between train and test is over-fitting.
SELECT results, metric, split, value, ci_low, ci_high, n
FROM metrics
WHERE level = 'cell' AND metric NOT LIKE 'n\_%' ESCAPE '\'
ORDER BY metric, results, list_position(['train', 'val', 'test', 'unseen'], split);
