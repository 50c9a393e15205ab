-- Cells called parasitized, by patient, the highest share first. It is no parasitaemia.
SELECT results, patient_id, max(label) AS label, count(*) AS n_cells, sum(predicted_label) AS n_parasitized,
       avg(predicted_label) AS parasitized_fraction
FROM predictions
GROUP BY results, patient_id
ORDER BY results, parasitized_fraction DESC, patient_id;
