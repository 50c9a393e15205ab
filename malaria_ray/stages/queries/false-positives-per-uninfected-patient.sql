-- The false positive rate of each patient without a parasitized cell: the noise that an infection must stand out from.
SELECT results, patient_id, count(*) AS n_cells, sum(predicted_label) AS n_false_positive,
       avg(predicted_label) AS false_positive_rate
FROM predictions
WHERE patient_id IS NOT NULL
GROUP BY results, patient_id
HAVING count(label) = count(*) AND max(label) = 0
ORDER BY results, false_positive_rate DESC, patient_id;
