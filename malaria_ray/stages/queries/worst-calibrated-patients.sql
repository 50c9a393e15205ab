-- Patients whose mean score is furthest from their share of cells labelled parasitized; 5 cells or more.
SELECT results, patient_id, count(*) AS n_cells, avg(score) AS mean_score, avg(label) AS observed_share,
       avg(score) - avg(label) AS error
FROM predictions
WHERE label IS NOT NULL AND patient_id IS NOT NULL
GROUP BY results, patient_id
HAVING count(*) >= 5
ORDER BY abs(error) DESC, results, patient_id
LIMIT 50;
