-- The 100 labelled cells that the model contradicts with most confidence: wrong calls, or wrong labels.
SELECT results, image_id, patient_id, label, score, abs(label - score) AS contradiction
FROM predictions
WHERE label IS NOT NULL AND label <> predicted_label
ORDER BY contradiction DESC, image_id
LIMIT 100;
