-- The 100 cells whose score lies nearest the threshold: what the model is least certain of.
SELECT results, image_id, patient_id, label, score, predicted_label, abs(score - threshold) AS distance
FROM predictions JOIN runs USING (results)
ORDER BY distance, image_id
LIMIT 100;
