-- How the scores of each split spread, in 20 bins, by label.
SELECT results, split, least(floor(score * 20), 19) / 20 AS score_from, count(*) AS n_cells,
       count(*) FILTER (label = 0) AS n_uninfected, count(*) FILTER (label = 1) AS n_parasitized,
       count(*) FILTER (label IS NULL) AS n_unlabelled
FROM cells
GROUP BY results, split, score_from
ORDER BY results, list_position(['test', 'unseen', 'val', 'train'], split), score_from;
