-- Held-out cells: patients whose mean score is furthest from their share labelled parasitized; 5 cells or more.
SELECT results, split, patient_id, count(*) AS n_cells, avg(score) AS mean_score, avg(label) AS observed_share,
       avg(score) - avg(label) AS error
FROM cells
WHERE label IS NOT NULL AND NOT is_copy AND patient_id IS NOT NULL AND split NOT IN ('train', 'val')
GROUP BY results, split, patient_id
HAVING count(*) >= 5
ORDER BY abs(error) DESC, results, patient_id, split
LIMIT 50;
