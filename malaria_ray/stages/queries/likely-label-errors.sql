-- The 100 labelled cells that the model contradicts with most confidence: wrong calls, or wrong labels. Of training cells
-- it contradicts few, as it has learnt their labels.
SELECT results, split, image_id, patient_id, label, score, abs(label - score) AS contradiction
FROM cells
WHERE label IS NOT NULL AND label <> predicted_label
ORDER BY contradiction DESC, image_id
LIMIT 100;
