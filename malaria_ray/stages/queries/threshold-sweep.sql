-- Sensitivity and specificity at thresholds from 0.1 to 0.9 of cells that the model was not trained on, by split; those
-- of val chose its epoch.
SELECT results, split, threshold, count(*) AS n_cells,
       avg((score >= threshold)::INT) FILTER (label = 1) AS sensitivity,
       avg((score < threshold)::INT) FILTER (label = 0) AS specificity
FROM (SELECT * EXCLUDE (threshold) FROM cells WHERE label IS NOT NULL AND NOT is_copy AND split <> 'train'),
     (SELECT (i / 10)::FLOAT AS threshold FROM range(1, 10) AS steps(i))
GROUP BY results, split, threshold
ORDER BY results, split, threshold;
