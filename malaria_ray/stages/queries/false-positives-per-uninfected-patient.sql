-- The false positive rate of each patient without a parasitized cell, by split: the noise that an infection must stand
-- out from; low among training cells, which the model has learnt.
SELECT results, split, patient_id, n_cells, n_parasitized AS n_false_positive,
       parasitized_fraction AS false_positive_rate
FROM patients
WHERE label = 0
ORDER BY results, list_position(['test', 'unseen', 'val', 'train'], split), false_positive_rate DESC, patient_id;
